"""What every benchmark needs: interleaved timing, the environment's description, tables, charts, stand-in machines."""
