# A tag, so that a rebuild takes up the base's security fixes. For an image that can be built again bit by bit, pass a digest:
# --build-arg BASE_IMAGE=python:3.13-slim@sha256:...
# The base must have Python 3.11+ with venv and pip, and ca-certificates.
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY requirements-build.lock requirements.lock ./
# The tools that build the wheel get a venv of their own, which stays behind; the product's has no pip.
RUN python3 -m venv /build \
 && /build/bin/pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r requirements-build.lock \
 && python3 -m venv --without-pip /opt/metquay-proxy \
 && /build/bin/pip --python /opt/metquay-proxy/bin/python install \
      --no-cache-dir --no-compile --require-hashes --no-deps --only-binary :all: -r requirements.lock
COPY LICENSE README.md pyproject.toml ./
COPY metquay_proxy metquay_proxy
# Byte code that is never checked against its source: the file system is read-only, and a copied file's time may change.
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist . \
 && /build/bin/pip --python /opt/metquay-proxy/bin/python install --no-cache-dir --no-compile --no-deps /dist/*.whl \
 && /opt/metquay-proxy/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/metquay-proxy/lib

FROM ${BASE_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="metquay-proxy" \
      org.opencontainers.image.description="A local authenticating reverse proxy for the Metquay API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/metquay-proxy /opt/metquay-proxy
# In bytes. With the first, glibc gives memory back in large pieces instead of after every TLS record; but to set it switches off
# glibc's own choice of what it maps anew for each large read, so that the second must say it.
ENV PATH=/opt/metquay-proxy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_TOP_PAD_=2097152 \
    MALLOC_MMAP_THRESHOLD_=4194304 \
    METQUAY_LISTEN=0.0.0.0:6387
EXPOSE 6387
# A number, so that Kubernetes can check runAsNonRoot. It owns no file and needs none that it can write.
USER 65532:65532
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["metquay-proxy", "health"]
ENTRYPOINT ["metquay-proxy"]
