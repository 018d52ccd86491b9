"""One router per API. A route turns the wire shape into one call of a behaviour, and back."""
