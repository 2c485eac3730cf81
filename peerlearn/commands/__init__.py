"""The verbs `configs`, `doctor` and `resume`: they concern the installation, or runs of any kind."""
