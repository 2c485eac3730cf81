"""Pretraining of a cohort: dataset -> checkpoint and export."""
