"""Read-outs against known answers, identities and mutants."""
