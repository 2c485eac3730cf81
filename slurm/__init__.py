"""Any verb as a job of a SLURM cluster: submit, requeue, status, logs, cancel."""
