"""Official formats of the field, one module each; `registry` finds every module of this folder that has a `FORMAT`."""
