"""What every room leans on: errors, registries, configs, files, hardware.  Standard library only."""
