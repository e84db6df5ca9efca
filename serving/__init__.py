"""DECIDES, online. Imports models, and of pipelines only what describes data at rest."""
