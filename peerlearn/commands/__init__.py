"""Verbs about the installation and about runs of any kind."""
