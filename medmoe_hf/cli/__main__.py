"""`python -m medmoe_hf.cli`: the `medmoe` command."""

from medmoe_hf.cli import app

if __name__ == "__main__":
    app(prog_name="medmoe")
