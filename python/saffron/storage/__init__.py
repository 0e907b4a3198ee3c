"""Files: read so that every fault names file and line, written so that they are whole or absent and nobody else's."""
