// The curves: one card each, drawn by Plotly when it comes into view.

const COLOURS = 8;

function readColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function fade(colour, alpha) {
  const value = parseInt(colour.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${alpha})`;
}

// Plotly reads some markup in the names of lines: they are shown without it.
function plain(text) {
  return String(text).replace(/[<>&]/g, " ");
}

function drawLine(line, index, isBar, isAlone, longest) {
  const colour = readColour("c" + (index % COLOURS));
  const name = plain(line.name);
  if (isBar) return [{ type: "bar", name, x: line.x, y: line.y, marker: { color: colour } }];
  const isFaint = line.style === "faint", isPath = line.style === "path";
  // Lines of about the same length look alike: all with marks at their points, or none.
  const isLong = longest >= 30 && line.x.length > longest / 3, isRaw = line.name.endsWith(", unsmoothed");
  const trace = {
    type: "scatter", name, x: line.x, y: line.y,
    mode: isLong ? "lines" : "lines+markers",
    line: { color: isFaint ? fade(colour, isLong ? 0.45 : 0.75) : colour, width: isFaint ? 1.5 : 2.25, dash: isFaint && !isLong ? "dot" : "solid" },
    marker: { size: isFaint ? 4 : 6, color: isFaint ? fade(colour, 0.75) : colour },
    hovertemplate: "%{y:.4~g}", legendgroup: String(index), showlegend: !isRaw, hoverinfo: isRaw ? "skip" : undefined,
    cliponaxis: false,
  };
  if (isPath) {
    trace.mode = isAlone ? "lines+markers+text" : "lines+markers";
    // Beside the interval of a point, which stands upright on it, and off a line that rises.
    trace.textposition = line.notes.map((_, at) => (at === 0 ? "bottom right" : "top left"));
    trace.textfont = { size: 10, color: readColour("quiet") };
    trace.text = line.notes.map((note, at) => shortenNote(plain(note), at, line.notes.length));
    trace.customdata = line.notes.map(plain);
    trace.hovertemplate = "%{customdata}<br>KL %{x:.3~g}, reward %{y:.4~g}<extra></extra>";
    trace.marker.size = line.x.length > 16 ? 4 : 6;
    if (line.low.length && line.x.length <= 16) trace.error_y = { type: "data", symmetric: false, array: minus(line.high, line.y), arrayminus: minus(line.y, line.low), thickness: 1, width: 0, color: fade(colour, 0.5) };
    return [trace];
  }
  if (isFaint || !line.low.length || line.low.some((value) => value === null)) return [trace];
  trace.hovertemplate = "%{y:.4~g} [%{customdata[0]:.4~g}, %{customdata[1]:.4~g}]";
  trace.customdata = line.low.map((low, at) => [low, line.high[at]]);
  const edge = { type: "scatter", x: line.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: String(index) };
  return [
    { ...edge, y: line.low },
    { ...edge, y: line.high, fill: "tonexty", fillcolor: fade(colour, 0.16) },
    trace,
  ];
}

// "round 3" at both ends of a path, "3" between them, and nothing where points stand close.
function shortenNote(note, at, count) {
  if (at === 0 || at === count - 1) return note;
  return count <= 9 ? note.replace("round ", "") : "";
}

function minus(some, others) {
  return some.map((value, at) => (value === null || others[at] === null ? 0 : value - others[at]));
}

function makeLayout(chart) {
  const ink = readColour("ink"), quiet = readColour("quiet"), grid = readColour("grid");
  const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { size: 11, color: quiet }, automargin: true };
  const isRound = chart.x === "round";
  const xs = chart.lines.flatMap((line) => line.x);
  const largest = Math.max(...chart.lines.flatMap((line) => line.y.map(Math.abs)));
  const last = Math.max(...xs), first = Math.min(...xs);
  const layout = {
    autosize: true, margin: { l: 44, r: 12, t: 8, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, Segoe UI, Noto Sans, DejaVu Sans, sans-serif", color: ink, size: 12 },
    hovermode: chart.lines.some((line) => line.style === "path") ? "closest" : "x unified",
    hoverlabel: { bgcolor: readColour("card"), bordercolor: grid, font: { color: ink, size: 12 } },
    showlegend: chart.lines.filter((line) => !line.name.endsWith(", unsmoothed")).length > 1,
    legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11, color: quiet } },
    xaxis: { ...axis, title: { text: chart.x, font: { size: 11, color: quiet }, standoff: 4 } },
    yaxis: { ...axis, exponentformat: largest >= 1000 ? "SI" : "e", title: { text: chart.y, font: { size: 11, color: quiet }, standoff: 4 } },
    barmode: "stack", dragmode: false, shapes: [], annotations: [],
  };
  if (isRound) {
    layout.xaxis.dtick = Math.max(1, Math.ceil((last - first) / 8));
    layout.xaxis.tick0 = 0;
    layout.xaxis.tickformat = "d";
  }
  if (chart.lines.some((line) => line.style === "bar")) layout.yaxis.rangemode = "tozero";
  if (chart.lines.some((line) => line.style === "path")) {
    const room = 0.09 * (last - first || 1);
    layout.xaxis.range = [first - room, last + room];
  }
  if (first === last && !isRound) layout.xaxis.range = [first - 1, last + 1];
  for (const [value, name] of chart.levels) {
    layout.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: quiet, width: 1, dash: "dash" } });
    layout.annotations.push({ xref: "paper", x: chart.marks.length ? 0 : 1, y: value, xanchor: chart.marks.length ? "left" : "right", yanchor: "bottom", text: plain(name), showarrow: false, bgcolor: fade(readColour("card"), 0.75), font: { size: 10, color: quiet } });
  }
  for (const [x, name] of chart.marks) {
    layout.shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, layer: "below", line: { color: quiet, width: 1, dash: "dot" } });
    layout.annotations.push({ yref: "paper", y: 1, x, textangle: -90, xanchor: "right", yanchor: "top", text: plain(name), showarrow: false, bgcolor: fade(readColour("card"), 0.75), font: { size: 10, color: quiet } });
  }
  return layout;
}

function drawChart(chart, place) {
  const isBar = chart.lines.some((line) => line.style === "bar");
  const longest = Math.max(...chart.lines.map((line) => line.x.length));
  let colour = -1;
  const traces = chart.lines.flatMap((line) => {
    if (!line.name.endsWith(", unsmoothed")) colour++;
    return drawLine(line, Math.max(colour, 0), isBar, chart.lines.length === 1, longest);
  });
  const layout = makeLayout(chart);
  const options = { displayModeBar: false, responsive: true, scrollZoom: false };
  return Plotly.react(place, traces, layout, options);
}

function makeCard(chart) {
  const card = make("article", "chart");
  card.append(make("h3", "", chart.title));
  const isSmoothed = chart.lines.some((line) => line.name.endsWith(", unsmoothed"));
  const about = chart.about + (isSmoothed ? " Smoothed; the faint line is not." : "");
  if (about) card.append(make("p", "", about.trim()));
  const place = make("div", "plot");
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", `${chart.title}: ${chart.lines.map(describeLine).join("; ")}`);
  card.append(place);
  return [card, place];
}

function describeLine(line) {
  const count = line.y.length;
  return `${line.name} from ${showNumber(line.y[0])} to ${showNumber(line.y[count - 1])}`;
}

// The library's text is allowed to run by its hash in the page's policy, and by nothing else.
async function loadPlotly(text) {
  const script = document.createElement("script");
  script.textContent = await text;
  document.head.append(script);
  return typeof Plotly !== "undefined";
}

async function showCharts() {
  const room = document.getElementById("charts");
  if (!room || !hasData("charts")) return;
  const library = hasData("plotly") ? unpack("plotly") : null;
  const charts = await unpackJson("charts");
  let x = "";
  const cards = charts.map((chart) => {
    const [card, place] = makeCard(chart);
    if (chart.x === "step" && x !== "step" && x !== "") room.append(make("h3", "divider", "In training, step by step"));
    x = chart.x;
    room.append(card);
    return { chart, card, place, isDrawn: false };
  });
  if (library === null || !(await loadPlotly(library))) {
    for (const one of cards) one.place.remove();
    return;
  }
  const draw = (one) => { one.isDrawn = true; drawChart(one.chart, one.place); };
  const watcher = new IntersectionObserver((seen) => {
    for (const entry of seen) {
      const one = cards.find((card) => card.card === entry.target);
      if (entry.isIntersecting && !one.isDrawn) draw(one);
    }
  }, { rootMargin: "50px" });
  for (const one of cards) watcher.observe(one.card);
  const redraw = () => { for (const one of cards) if (one.isDrawn) draw(one); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => { for (const one of cards) if (!one.isDrawn) draw(one); });
}
