"""Case studies: one script each, run as ``python -m case_studies.NAME``."""
