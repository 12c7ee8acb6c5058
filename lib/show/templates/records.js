  // Records: the rows of the embedded records.csv. The table is made when its part is opened or a
  // number leads to a record; it shows a few rows at a time, for no one reads them all.
  var AT_ONCE = 20, recordLink = document.querySelector("#records a[download]"), recordTable = null, recordText = "";

  // What is embedded compressed, as text. Browsers can since 2023.
  function unpacked(base64) {
    var bytes = Uint8Array.from(atob(base64), function (c) { return c.charCodeAt(0); });
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  function parseCsv(text) {
    var rows = [[]], field = /("(?:[^"]|"")*"|[^",\n]*)(,|\n|$)/g, match;
    while (field.lastIndex < text.length && (match = field.exec(text))) {
      rows[rows.length - 1].push(match[1].charAt(0) === '"' ? match[1].slice(1, -1).replace(/""/g, '"') : match[1]);
      if (match[2] === "\n") { rows.push([]); }
    }
    return rows.filter(function (row) { return row.length; });
  }
  function allRecords() {  // its lines by name, and the header
    if (!allRecords.lines && recordText) {
      allRecords.lines = parseCsv(recordText);
      allRecords.header = allRecords.lines.shift();
      allRecords.byName = new Map(allRecords.lines.map(function (line) { return [line[0], line]; }));
    }
    return allRecords.lines || [];
  }
  function record(name) { return allRecords().length ? allRecords.byName.get(name) : undefined; }

  function makeRecordTable() {
    if (recordTable || !allRecords().length) { return; }
    var box = document.createElement("p"), field = document.createElement("input"), count = document.createElement("span");
    var more = document.createElement("button"), region = document.createElement("div"), head, limit = AT_ONCE;
    recordTable = document.createElement("table");
    recordTable.className = "data";
    head = recordTable.createTHead().insertRow();
    allRecords.header.forEach(function (title) {
      var th = document.createElement("th");
      th.scope = "col";
      th.textContent = title;
      head.append(th);
    });
    recordTable.createTBody();
    box.className = "filter";
    field.type = "search";
    field.placeholder = "Filter records";
    field.autocomplete = "off";
    field.setAttribute("aria-label", "Filter records");
    count.setAttribute("role", "status");
    more.type = "button";
    more.textContent = "Show all";
    box.append(field, count, more);
    region.className = "scroll";
    region.tabIndex = 0;
    region.setAttribute("role", "region");
    region.setAttribute("aria-label", "Records");
    region.append(recordTable);
    document.getElementById("records").append(box, region);
    function fill() {
      var words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      var lines = allRecords().filter(function (line) {
        var text = line.join(" ").toLowerCase();
        return words.every(function (word) { return text.indexOf(word) >= 0; });
      });
      recordTable.tBodies[0].replaceChildren.apply(recordTable.tBodies[0], lines.slice(0, limit).map(function (line) {
        var row = document.createElement("tr");
        row.id = "record-" + line[0];
        line.forEach(function (text, i) {
          var cell = document.createElement(i ? "td" : "th");
          if (i) { cell.className = text.length > 36 ? "text long" : "text"; } else { cell.scope = "row"; }
          cell.textContent = text;
          row.append(cell);
        });
        return row;
      }));
      count.textContent = Math.min(limit, lines.length) + " of " + lines.length + " records";
      more.hidden = lines.length <= limit;
    }
    field.addEventListener("input", function () { limit = AT_ONCE; fill(); });
    more.addEventListener("click", function () { limit = Infinity; fill(); });
    recordTable.find = function (text) { field.value = text; limit = AT_ONCE; fill(); };
    fill();
  }
  function showRecord(name) {  // alone in the table, so that a link leads to it
    if (!record(name)) { return; }
    makeRecordTable();
    recordTable.find(name);
    var row = document.getElementById("record-" + name);
    if (row) { row.className = "here"; }
  }
  if (recordLink && window.DecompressionStream) {
    document.getElementById("records").addEventListener("toggle", makeRecordTable);
    unpacked(recordLink.href.split(",")[1]).then(function (text) {
      recordText = text;
      if (location.hash.indexOf("#record-") === 0) { reveal(); }
      if (document.getElementById("records").open) { makeRecordTable(); }
    });
  }
