"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("optplan-figures");
  const records = read("optplan-records");
  const status = document.getElementById("status");
  const drawn = new Set();

  // Figures name colours as custom properties, so that one set of them serves both schemes.
  const resolve = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolve(item, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    return value;
  };

  const draw = (id) => {
    const style = getComputedStyle(document.documentElement);
    const { data, layout } = resolve(figures[id], style);
    drawn.add(id);
    return Plotly.react(id, data, layout, { displayModeBar: false, responsive: true, doubleClick: false });
  };
  const drawAll = () => Object.keys(figures).forEach(draw);

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || drawn.has(entry.target.id)) continue;
      watcher.unobserve(entry.target);
      draw(entry.target.id);
    }
  }, { rootMargin: "400px" });

  const redraw = () => drawn.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.printing = "";
    drawAll();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.printing;
    drawAll();
  });

  const tell = (text) => { status.textContent = ""; requestAnimationFrame(() => { status.textContent = text; }); };
  const flash = (button, text) => {
    const label = button.firstChild, before = button.dataset.label ?? label.textContent;
    button.dataset.label = before;
    label.textContent = text;
    tell(text);
    setTimeout(() => { label.textContent = before; }, 1500);
  };
  const copy = async (button, text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    flash(button, "Copied");
  };
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // Exact values, not the rounded ones that are shown.
  const cells = (id) => [...document.getElementById(id).rows].map((row) =>
    [...row.cells].map((cell) => cell.dataset.title ?? cell.dataset.value ?? cell.textContent));
  const quoted = (text) => {
    // A spreadsheet must not take a name for a formula.
    const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const csv = (id) => cells(id).map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { copyTable, csvTable, copyText, saveText, fileName, saveRecord } = button.dataset;
    if (copyTable) copy(button, cells(copyTable).map((row) => row.join("\t")).join("\n"));
    if (csvTable) { save(`${csvTable}.csv`, "text/csv", csv(csvTable)); tell("Saved"); }
    if (copyText) copy(button, document.getElementById(copyText).textContent);
    if (saveText) { save(fileName, "text/plain", document.getElementById(saveText).textContent); tell("Saved"); }
    if (saveRecord) {
      save(saveRecord, "application/json", JSON.stringify(Object.values(records)[0], null, 2));
      tell("Saved");
    }
  });

  const gib = (bytes) => (bytes / 2 ** 30).toFixed(2);
  const verdictOf = ({ optimizer, gpu, fits, headroom_bytes: headroom }) => {
    if (fits === null) return `${optimizer} has room on ${gpu} by bytes, so little that the command below has to decide`;
    if (fits) return `${optimizer} fits on ${gpu}`;
    return `${optimizer} does not fit on ${gpu}${headroom >= 0 ? ": fragmentation takes the room that bytes leave" : ""}`;
  };
  const answer = () => {
    const selects = [...document.querySelectorAll("select[data-axis]")];
    const wanted = Object.fromEntries(selects.map((select) => [select.dataset.axis, select.value]));
    const cell = records.what_if.cells.find((found) =>
      Object.entries(wanted).every(([axis, value]) => String(found[axis]) === value));
    const verdict = document.getElementById("what-if-verdict");
    verdict.className = `answer ${cell?.fits ? "good" : cell?.fits === false ? "bad" : ""}`;
    verdict.textContent = cell ? verdictOf(cell) : "This combination cannot run";
    for (const field of document.querySelectorAll("#switches [data-field]")) {
      const value = cell?.[field.dataset.field];
      field.textContent = value === undefined ? "–" : typeof value === "number" ? gib(value) : value;
      if (typeof value === "number") field.dataset.value = value;
      else delete field.dataset.value;
    }
    document.getElementById("what-if-command").textContent = cell ? cell.command : "";
    const { data, layout } = figures["what-if-plot"];
    for (const trace of data) {
      const bytes = cell?.peak_categories[trace.meta] ?? 0;
      trace.x = [bytes / 2 ** 30];
      trace.customdata = [bytes];
    }
    const usable = (cell?.usable_bytes ?? 0) / 2 ** 30;
    Object.assign(layout.shapes[0], { x0: usable, x1: usable });
    Object.assign(layout.annotations[0], {
      x: usable, text: `usable ${usable.toFixed(2)} GiB`, xanchor: usable > layout.xaxis.range[1] / 2 ? "right" : "left",
    });
    if (drawn.has("what-if-plot")) draw("what-if-plot");
  };
  if (document.getElementById("switches")) {
    document.querySelectorAll("select[data-axis]").forEach((select) => select.addEventListener("change", answer));
    answer();
  }

  for (const id of Object.keys(figures)) watcher.observe(document.getElementById(id));
  document.documentElement.dataset.ready = "";
})();
