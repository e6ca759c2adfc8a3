// Values under the pointer, sortable tables, and days on the hardware that the reader chooses.
// Without it the page still shows everything that it says in print.
"use strict";

// -- values of a figure: {"points": [[x, y, text, colour], ...]} in the user units of its SVG --
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const data = figure.querySelector("script");
  if (!svg || !data) continue;
  const points = JSON.parse(data.textContent).points;
  if (!points.length) continue;
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  ring.setAttribute("r", "6");
  ring.setAttribute("class", "ring");
  svg.append(ring);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  figure.append(tip);
  let current = -1;

  const hide = () => { current = -1; tip.classList.remove("on"); ring.classList.remove("on"); };
  const show = (index) => {
    current = index;
    const [x, y, text, colour] = points[index];
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    ring.style.stroke = colour ? `var(--${colour})` : "var(--ink)";
    tip.textContent = text;
    ring.classList.add("on");
    tip.classList.add("on");
    const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    tip.style.left = tip.style.top = "0";  // measured where nothing squeezes it
    const width = document.documentElement.clientWidth, height = document.documentElement.clientHeight;
    const left = Math.max(Math.min(at.x + 14, width - tip.offsetWidth - 4), 4);
    const above = left < at.x + 8 || at.y + 14 + tip.offsetHeight > height;  // else it would cover the point
    tip.style.left = `${left}px`;
    tip.style.top = `${above ? Math.max(at.y - tip.offsetHeight - 14, 4) : at.y + 14}px`;
  };
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = -1, least = 24 ** 2;
    points.forEach(([x, y], index) => {
      const far = (x - at.x) ** 2 + (y - at.y) ** 2;
      if (far < least) { least = far; best = index; }
    });
    if (best < 0) hide(); else if (best !== current) show(best);
  });
  svg.addEventListener("pointerleave", hide);
  addEventListener("scroll", hide, { capture: true, passive: true });
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    show((Math.max(current, step > 0 ? -1 : 0) + step + points.length) % points.length);
  });
  svg.addEventListener("blur", hide);
}

// -- tables: a click on a head sorts by its column, a second one the other way --
const valueOf = (row, column) => {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  const plain = text.replace(/\u2212/g, "-").replace(/,/g, "").replace(/ %$/, "");
  return /^-?\d+(\.\d+)?(e[-+]?\d+)?$/.test(plain) ? Number(plain) : text;
};
const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;  // numbers before words and empty cells
  if (typeof b === "number") return 1;
  return a.localeCompare(b, undefined, { numeric: true });
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button?.addEventListener("click", () => {
      const upward = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", upward ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
      rows.sort(([a], [b]) => {
        const missing = (typeof a === "string") - (typeof b === "string");
        const mixed = typeof a !== typeof b;
        return mixed ? missing : compare(a, b) * (upward ? 1 : -1);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// -- days: FLOPs of a cell over peak x devices x utilisation --
const words = (days) => {
  const units = [["seconds", 1 / 86400, 90], ["minutes", 1 / 1440, 90], ["hours", 1 / 24, 48], ["days", 1, 1000]];
  const digits = (x) => (x >= 100 ? x.toFixed(0) : x.toPrecision(3));
  for (const [name, size, most] of units) if (days < most * size) return `${digits(days / size)} ${name}`;
  const years = days / 365.25;
  return `${years < 1e6 ? digits(years) : years.toExponential(1)} years`;
};
for (const form of document.querySelectorAll("form.hardware")) {
  const cells = form.parentElement.querySelectorAll("[data-flops]");
  const update = () => {
    const peak = Number(form.elements.chip.value), count = Number(form.elements.count.value);
    const share = Number(form.elements.mfu.value) / 100;
    if (!(peak > 0 && count >= 1 && share > 0 && share <= 1)) return;
    for (const cell of cells) {
      const days = Number(cell.dataset.flops) / (peak * count * share) / 86400;
      cell.textContent = words(days);
      cell.dataset.value = String(days);
    }
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}
