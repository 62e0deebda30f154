"""The audit of the journal: what can be checked without trusting anybody, what is handed to others, what is erased."""
