"""What pyproject.toml cannot say: the recipes in `configs/` are shipped as `qat.configs`."""

from setuptools import find_namespace_packages, find_packages, setup

recipes = ["qat.configs", *(f"qat.configs.{name}" for name in find_namespace_packages("configs"))]
setup(
    packages=[*find_packages(include=["qat*", "binaryvit*", "ptq_init*"]), *recipes],
    package_dir={"qat.configs": "configs"},
    package_data={"": ["*.yaml", "py.typed"]},
)
