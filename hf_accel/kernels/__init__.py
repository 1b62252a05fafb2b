"""How an operation is run on this machine: one package or file per back end."""
