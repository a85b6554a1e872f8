"""Pictures of occupancy and flow, drawn in memory: no display, no OpenGL."""
