(() => {
  const drawn = [];
  for (const element of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(document.getElementById(element.dataset.figure).textContent);
    const settings = { responsive: true, displayModeBar: false };
    Plotly.newPlot(element, figure.data, figure.layout, settings);
    drawn.push(element);
  }
  // paper is narrower than most screens
  addEventListener("beforeprint", () => {
    for (const element of drawn) Plotly.relayout(element, { width: 660, autosize: false });
  });
  addEventListener("afterprint", () => {
    for (const element of drawn) Plotly.relayout(element, { width: null, autosize: true });
  });
})();
