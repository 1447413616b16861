# Everything a node of a cluster needs, as on the machine where it was tested: docker build -t REPLACE/entprog .
# Ray's image brings what `ray up` and KubeRay expect (user `ray`, ssh tools); its Ray is replaced by the locked one.
FROM rayproject/ray:2.60.0-py311-gpu

USER root
RUN apt-get update && apt-get install --yes --no-install-recommends nfs-common rsync && rm -rf /var/lib/apt/lists/*
USER ray
WORKDIR /home/ray/entprog

# Dependencies first: they change less often than the code.
COPY --chown=ray pyproject.toml constraints.txt requirements.lock README.md ./
RUN mkdir -p entprog pipelines tune_spaces \
    && pip install --no-cache-dir --constraint constraints.txt '.[pose]' && pip uninstall --yes entprog
COPY --chown=ray . .
RUN pip install --no-cache-dir --no-deps --editable . && python -m pipelines.train --help > /dev/null

# A job that is told to stop has time for a checkpoint.
ENV RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=100
