"""More devices than one: how arrays lie on them, and what that costs."""
