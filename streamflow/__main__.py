"""`python -m streamflow`: the command line."""

from streamflow.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="streamflow")
