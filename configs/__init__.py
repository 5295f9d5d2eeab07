"""Configurations shipped with the package: one YAML file is one run."""
