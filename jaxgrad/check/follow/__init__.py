"""A person's own code, followed line by line: where its numbers first part from the truth."""
