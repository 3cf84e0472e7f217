"""Architectures: single-device maths plus `meshes.constrain`. One file per architecture holds its Config and its named sizes."""
