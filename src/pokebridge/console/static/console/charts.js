// The figures over time, since this page was opened.

import { formatCount, formatMs, formatRate, formatShare } from "./format.js";

const HEIGHT_PX = 170;
const WIDEST_LABEL_PX = 70; // such as 1,000 ms
const WINDOW_S = 600;
const LEAST_SPAN_S = 60;
const stepped = uPlot.paths.stepped({ align: 1 });

const CHARTS = [
  {
    title: "Deliveries against the red line",
    format: formatRate,
    unit: "/s",
    series: [
      { label: "deliveries", color: "--commit", of: (load) => load.opsPerS, fill: true },
      { label: "red line", color: "--bad", of: (load) => load.redLine, dash: [6, 4] },
    ],
  },
  {
    title: "Signals in, pokes out",
    format: formatRate,
    unit: "/s",
    series: [
      { label: "signals in", color: "--pull", of: (load) => load.inPerS },
      { label: "pokes out", color: "--poke", of: (load) => load.outPerS, dash: [3, 3] },
    ],
  },
  {
    title: "Noise ratio",
    format: formatShare,
    unit: "",
    least: 0.1,
    series: [{ label: "CPU on others' pokes", color: "--shown", of: (load) => load.noise, fill: true }],
  },
  {
    title: "Pull latency",
    format: formatMs,
    unit: "",
    series: [{ label: "99th percentile", color: "--pull", of: (load) => load.pullMs, fill: true }],
    least: 2,
  },
];

export class Charts {
  #times = [];
  #values;
  #charts;

  constructor(root) {
    this.#values = CHARTS.map((chart) => chart.series.map(() => []));
    this.#charts = CHARTS.map((chart) => new Chart(root, chart));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#charts.forEach((chart) => chart.forget());
      this.#draw();
    });
  }

  /** Add the newest figures. */
  add(load) {
    const nowS = Date.now() / 1000;
    this.#times.push(nowS);
    CHARTS.forEach((chart, i) =>
      chart.series.forEach(({ of }, j) => this.#values[i][j].push(of(load))),
    );
    if (this.#times[0] < nowS - WINDOW_S) {
      this.#times.shift();
      this.#values.flat().forEach((values) => values.shift());
    }
    this.#draw();
  }

  /** Draw the latest figures up to now. */
  extend() {
    if (this.#times.length > 0) this.#draw();
  }

  #draw() {
    const nowS = Date.now() / 1000;
    const times = [...this.#times, nowS];
    this.#charts.forEach((chart, i) => {
      chart.draw([times, ...this.#values[i].map((values) => [...values, values.at(-1)])]);
    });
  }
}

class Chart {
  #spec;
  #figure;
  #plot = null;

  constructor(root, spec) {
    this.#spec = spec;
    this.#figure = document.createElement("figure");
    this.#figure.className = "card";
    const caption = document.createElement("figcaption");
    const title = document.createElement("b");
    title.textContent = spec.title;
    const now = document.createElement("span");
    caption.append(title, now);
    const canvas = document.createElement("div");
    canvas.setAttribute("role", "img");
    this.#figure.append(caption, canvas);
    root.append(this.#figure);
    new ResizeObserver(() => this.#plot?.setSize(this.#size)).observe(canvas);
  }

  draw(data) {
    const { title, series, format, unit } = this.#spec;
    const now = series
      .map(({ label }, i) => [label, data[i + 1].at(-1)])
      .map(([label, value]) => `${label} ${value === null ? "–" : `${format(value)}${unit}`}`)
      .join(" · ");
    this.#figure.querySelector("span").textContent = now;
    this.#canvas.setAttribute("aria-label", `${title} over time; now ${now}`);
    if (this.#plot) this.#plot.setData(data);
    else this.#plot = new uPlot(this.#options(), data, this.#canvas);
  }

  /** Drop the drawing; the next one uses the new colours. */
  forget() {
    this.#plot?.destroy();
    this.#plot = null;
  }

  get #canvas() {
    return this.#figure.querySelector("div");
  }

  get #size() {
    return { width: this.#canvas.clientWidth, height: HEIGHT_PX };
  }

  #options() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const { series, format, least } = this.#spec;
    const axis = {
      stroke: color("--muted"),
      grid: { stroke: color("--line"), width: 1 },
      ticks: { stroke: color("--line"), width: 1 },
      font: "11px system-ui",
    };
    return {
      ...this.#size,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { range: (_, low, high) => [Math.min(low, high - LEAST_SPAN_S), high] },
        y: { range: (_, __, high) => [0, Math.max(high * 1.15, least ?? 0) || 1] },
      },
      axes: [
        { ...axis, space: 70, size: 26 },
        { ...axis, size: WIDEST_LABEL_PX, values: (_, ticks) => ticks.map((tick) => shortened(tick, format)) },
      ],
      series: [
        {},
        ...series.map(({ label, color: name, dash, fill }) => ({
          label,
          dash,
          stroke: color(name),
          width: 2,
          fill: fill ? `color-mix(in srgb, ${color(name)} 16%, transparent)` : undefined,
          paths: stepped,
          points: { show: false },
        })),
      ],
    };
  }
}

/** Room on an axis is scarce. */
const shortened = (tick, format) => (tick >= 10_000 ? `${formatCount(tick / 1000)}k` : format(tick));
