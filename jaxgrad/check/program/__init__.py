"""The loss as a program: its steps, their replay with one step done wrong, and where its source says them."""
