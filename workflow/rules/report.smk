rule report:
    """summary.csv, the table, the HTML report and its audit page."""
    input:
        unpack(inputs("report")),
    output:
        **outputs(
            "report",
            category="Summary",
            table_md="table",
            html="page",
            audit_html="audit",
        ),
    log:
        log_of("report"),
    benchmark:
        benchmark_of("report")
    conda:
        "../envs/ebjdat.yaml"
    params:
        command=command("report"),
        depends_on=depends_on("report"),
    shell:
        "python -m ebjdat {params.command} > {log} 2>&1"
