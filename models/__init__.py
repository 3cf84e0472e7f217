"""Architectures: single-device maths plus `meshes.constrain`. One architecture is one file: Config and named sizes."""
