rule record:
    """Bring the profile's dvc.yaml up to date and have DVC cache what this workflow made, so that `dvc repro` has nothing to do."""
    input:
        jobs.outputs(LAYOUT, jobs.Job("report")).values(),
    output:
        touch(RECORDED),
    log:
        LAYOUT.log("", "record"),
    conda:
        "../envs/ebjdat.yaml"
    params:
        profile=config["profile"],
        stages=str(dvc_stages.target(RUN)),
        lock=dvc_results.lock_of(RUN),
        synced=dvc_results.last_synced_lock(RUN),
    shell:
        "(python workflow/scripts/dvc_stages.py --profile {params.profile} --recordable"
        " && dvc commit --force {params.stages} && cp {params.lock} {params.synced}) 2>&1 | tee -i {log}"
