"""What users run and import: the command line, a whole cluster on one machine, the client."""
