"""What touches the world: each module implements one port of stagecal.ports and decides nothing."""
