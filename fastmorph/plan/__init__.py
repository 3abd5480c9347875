"""Plans of morphs, and the one transaction that carries a plan out."""
