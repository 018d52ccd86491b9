"""The agentic system: agents, their sessions, and the turns of these, each step of which is written down."""
