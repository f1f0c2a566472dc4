-- Answers: what does the OUSStatus document of this MOUS say? Its sessions tell which EBs were calibrated together.
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: XML  the document as text; a site whose archive keeps XMLTYPE writes ous.XML.getClobVal() AS XML
-- Rows:    none means that there is no such MOUS; DISTINCT is not possible, because Oracle compares no CLOBs.
SELECT
    ous.XML
FROM ALMA.OBS_UNIT_SET_STATUS ous
WHERE ous.STATUS_ENTITY_ID = :mous_uid
