"""What every room uses: atomic files, YAML, output on the console."""
