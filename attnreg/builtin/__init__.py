"""Built-in backends: the same record and the same hook as any plugin's."""
