"""The command line: `streamflow`, one module per group of commands, each imported when it is called for."""
