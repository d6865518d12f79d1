"""What every room leans on: errors, registries, configs, files, hardware, versions.  Standard library only."""
