"""The sections of the pages, each a function from records to a `Section`."""
