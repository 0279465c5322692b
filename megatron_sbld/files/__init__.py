"""What users write and name: strict YAML and JSON, paths, outputs that must not overwrite inputs; syncing to disk."""
