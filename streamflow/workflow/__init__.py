"""What users write: decorators, the deterministic loop, and the calls that work inside a workflow."""
