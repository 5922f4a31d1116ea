"""What pyproject.toml cannot say: recipes are shipped as `qat.configs`, kernels need a compiler."""

from glob import glob

from setuptools import Extension, find_namespace_packages, find_packages, setup

recipes = ["qat.configs", *(f"qat.configs.{name}" for name in find_namespace_packages("configs"))]
kernels = Extension(
    "qat.kernels.src._native",  # called by ctypes; `src` is no package, so nobody imports it
    sorted(glob("qat/kernels/src/*.cpp")),
    depends=sorted(glob("qat/kernels/src/*.h")),
    language="c++",
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-pthread",
        "-ffp-contract=off",  # the same floats on every instruction set
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the package installs and runs by NumPy
)
setup(
    packages=[*find_packages(include=["qat*", "binaryvit*", "ptq_init*"]), *recipes],
    package_dir={"qat.configs": "configs"},
    package_data={"": ["*.yaml", "*.html", "py.typed"]},
    exclude_package_data={"qat.kernels": ["src/*"]},  # needed to build, not to run
    ext_modules=[kernels],
)
