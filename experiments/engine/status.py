"""The exit statuses of the study."""

OK, FAILED, UNUSABLE, AGAIN, INTERRUPTED = 0, 1, 2, 75, 130
