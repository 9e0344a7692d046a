"use strict";
// Reads the charts out at one place for all: by pointer, by touch, or by the arrow keys. Without it the page still shows
// every chart and table. Texts go in as texts only; markup comes from the server of a live page alone, ready-made.
(() => {
  const byId = (id) => document.getElementById(id);
  const axis = () => (byId("x-time").checked ? "time" : "step");
  let data;
  let at = null; // where the charts are read, on the axis that is shown

  const clock = (seconds) => {
    const whole = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
    const hours = Math.floor(whole / 3600), rest = `${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
    return hours ? `${hours}:${rest}` : rest;
  };

  const digits = (value) => {
    const large = Math.abs(value) >= 1000;
    return value.toLocaleString("en-US", large ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 });
  };

  const number = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : digits(value));

  const shown = (value, unit) => {
    if (value === null || value === undefined) return "–";
    return unit === "%" ? `${digits(100 * value)} %` : unit ? `${number(value)} ${unit}` : number(value);
  };

  // The last point of a grid that is not behind `where`; the first where all are.
  const pointAt = (grid, where) => {
    const places = grid[axis()];
    let low = 0, high = places.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (places[middle] <= where) low = middle; else high = middle - 1;
    }
    return low;
  };

  const said = (chart, curve, point) => {
    const mean = shown(curve.mean[point], chart.unit);
    if (!curve.low || curve.low[point] === null) return mean;
    return `${mean} (${shown(curve.low[point], chart.unit)} to ${shown(curve.high[point], chart.unit)})`;
  };

  // All figures of all charts at one place; at the newest where `where` is null.
  const read = (where) => {
    at = where;
    document.body.classList.toggle("reading", where !== null);
    const place = where === null ? data[axis()] : where;
    for (const [key, chart] of Object.entries(data.charts)) {
      const labels = byId(key).querySelectorAll(".legend b");
      chart.curves.forEach((curve, index) => {
        if (labels[index]) labels[index].textContent = said(chart, curve, pointAt(data.grids[curve.grid], place));
      });
    }
    const share = data[axis()] ? `${(100 * place) / data[axis()]}%` : "0%";
    for (const line of document.querySelectorAll(".cursor")) {
      line.setAttribute("x1", share);
      line.setAttribute("x2", share);
    }
    const grid = data.grids[0];
    if (where === null || !grid || !grid.step.length) {
      byId("where").textContent = "";
    } else {
      const point = pointAt(grid, where);
      byId("where").textContent = `step ${grid.step[point].toLocaleString("en-US")}, ${clock(grid.time[point])}`;
    }
  };

  const gridOf = (figure) => {
    const chart = data.charts[figure.id];
    const grids = chart ? chart.curves.map((curve) => data.grids[curve.grid]) : data.grids;
    return grids.reduce((most, grid) => (grid.step.length > most.step.length ? grid : most), { step: [], time: [] });
  };

  const tell = (drawing, figure, places) => {
    const texts = [...figure.querySelectorAll(".legend li")].filter((entry) => entry.querySelector("b"));
    const figures = texts.map((entry) => entry.textContent.trim().replace(/\s+/g, " ")).join("; ");
    drawing.setAttribute("aria-valuenow", String(at));
    drawing.setAttribute("aria-valuetext", `${byId("where").textContent}: ${figures}`);
    drawing.setAttribute("aria-valuemax", String(places[places.length - 1] ?? 0));
  };

  const MOVES = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };

  const watch = (drawing) => {
    const figure = drawing.closest("figure");
    drawing.setAttribute("tabindex", "0");
    drawing.setAttribute("role", "slider");
    drawing.setAttribute("aria-valuemin", "0");
    drawing.setAttribute("aria-valuenow", "0");
    const follow = (event) => {
      const box = drawing.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      read(share * data[axis()]);
    };
    drawing.addEventListener("pointermove", follow);
    drawing.addEventListener("pointerdown", follow);
    drawing.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && read(null));
    drawing.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return read(null);
      const move = MOVES[event.key];
      const grid = gridOf(figure), places = grid[axis()];
      if (move === undefined || !places.length) return undefined;
      event.preventDefault();
      const now = at === null ? places.length - 1 : pointAt(grid, at);
      read(places[at === null && move === 1 ? now : Math.min(places.length - 1, Math.max(0, now + move))]);
      return tell(drawing, figure, places);
    });
  };

  // Every point of a chart, when somebody opens its table.
  const fill = (details) => {
    const chart = data.charts[details.id.replace(/-table$/, "")];
    if (!chart || !details.open || details.querySelector(".points")) return;
    const names = [...details.querySelectorAll("tbody th")].map((cell) => cell.textContent);
    const table = document.createElement("table");
    table.className = "points";
    const row = (tag, texts) => {
      const line = table.insertRow();
      for (const text of texts) line.appendChild(document.createElement(tag)).textContent = text;
    };
    row("th", ["step", "time", ...names]);
    const grid = gridOf(byId(details.id).closest("figure"));
    grid.step.forEach((step, point) => {
      const figures = chart.curves.map((curve) => {
        const own = data.grids[curve.grid];
        return own.step.length ? said(chart, curve, pointAt(own, grid[axis()][point])) : "–";
      });
      row("td", [step.toLocaleString("en-US"), clock(grid.time[point]), ...figures]);
    });
    details.querySelector(".scroll").appendChild(table);
  };

  const begin = () => {
    data = JSON.parse(byId("data").textContent);
    document.querySelectorAll(".drawing").forEach(watch);
    for (const link of document.querySelectorAll(".bar a")) link.hidden = !byId(link.hash.slice(1));
    for (const details of document.querySelectorAll("details")) {
      details.addEventListener("toggle", () => fill(details));
    }
    read(null);
  };

  for (const choice of document.querySelectorAll("input[name=axis]")) {
    choice.addEventListener("change", () => read(null));
  }
  begin();

  // -- a live page asks for news -------------------------------------------------------------------------------
  if (!document.documentElement.dataset.live) return;
  const EVERY_MS = 2000;
  const state = document.createElement("span");
  state.id = "live";
  document.querySelector(".bar").appendChild(state);
  let known = "";

  const replace = (markup) => {
    const main = byId("main");
    const chosen = [...main.querySelectorAll("input:checked")].map((choice) => choice.id);
    const open = [...main.querySelectorAll("details[open]")].map((details) => details.id);
    const focused = document.activeElement?.closest?.("figure")?.id;
    const kept = at;
    main.innerHTML = markup;
    begin();
    for (const id of open) if (byId(id)) byId(id).open = true;
    for (const id of chosen) if (byId(id)) byId(id).checked = true;
    if (focused) byId(focused)?.querySelector(".drawing")?.focus({ preventScroll: true });
    if (kept !== null) read(kept);
  };

  const ask = async () => {
    try {
      const answer = await fetch("main", { headers: { "If-None-Match": known }, signal: AbortSignal.timeout(10000) });
      if (answer.status === 200) {
        known = answer.headers.get("ETag") ?? "";
        replace(await answer.text());
      } else if (answer.status !== 304) {
        throw new Error(`HTTP ${answer.status}`);
      }
      state.className = "";
      state.textContent = "live";
    } catch (error) {
      state.className = "lost";
      state.textContent = `no answer (${error.message})`;
    }
    setTimeout(ask, EVERY_MS);
  };
  ask();
})();
