"""HTML -> text, by an extractor that is named in the configuration and runs in a sandbox."""
