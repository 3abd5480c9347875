"""The suite of whole networks: what plans of many widths cost, beside what they cannot do without and beside others."""
