(async () => {
  // the inverse of page.py: deflated, in base 85
  const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%.()*+-;,=>?@^_`{|}~";
  const unpack = async (name) => {
    const text = document.getElementById(name).textContent;
    const values = new Uint8Array(128);
    for (let i = 0; i < DIGITS.length; i++) values[DIGITS.charCodeAt(i)] = i;
    const bytes = new Uint8Array(Math.ceil(text.length / 5) * 4);
    for (let i = 0, to = 0; i < text.length; i += 5, to += 4) {
      let word = 0;
      for (let k = 0; k < 5; k++) word = word * 85 + (i + k < text.length ? values[text.charCodeAt(i + k)] : 84);
      for (let k = 3; k >= 0; k--, word = Math.floor(word / 256)) bytes[to + k] = word % 256;
    }
    const size = Math.floor((text.length * 4) / 5);
    const stream = new Blob([bytes.subarray(0, size)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).text();
  };
  const elements = [...document.querySelectorAll(".plot")];
  if (!elements.length) return;
  if (!("DecompressionStream" in window)) {
    for (const element of elements) element.textContent = "Figures need a browser of 2023 or later; the tables do not.";
    return;
  }
  const figures = JSON.parse(await unpack("figures"));
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.body.append(script);
  for (const element of elements) {
    const figure = figures[element.dataset.figure];
    Plotly.newPlot(element, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  }
  // paper is narrower than most screens
  addEventListener("beforeprint", () => {
    for (const element of elements) Plotly.relayout(element, { width: 660, autosize: false });
  });
  addEventListener("afterprint", () => {
    for (const element of elements) Plotly.relayout(element, { width: null, autosize: true });
  });
})();
