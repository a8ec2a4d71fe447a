# msdiff in a container.
#   CPU:   docker build -t msdiff .
#   CUDA:  docker build -t msdiff --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   use:   docker run --rm -v "$PWD:/work" msdiff demo            (CUDA: add --gpus all)
# The wheels of torch bring the CUDA libraries; the machine needs only its driver and the NVIDIA Container Toolkit.
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=demo
RUN pip install --no-cache-dir 'torch>=2.9' --index-url "$TORCH_INDEX"
COPY pyproject.toml README.md LICENSE /package/
COPY src /package/src
RUN pip install --no-cache-dir "/package[$EXTRAS]"
# files are written to the mounted folder; run with --user to own them
ENV MPLCONFIGDIR=/tmp/matplotlib MSDIFF_CACHE=/tmp/msdiff-cache
WORKDIR /work
ENTRYPOINT ["msdiff"]
CMD ["--help"]
