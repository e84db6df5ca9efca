"""WATCHES. Reads tables; changes nothing."""
