"""What every package uses: atomic files, YAML, logging, lazy imports."""
